"""How long an expanded layer takes, and what it draws: side by side with others, checked before it is timed."""
