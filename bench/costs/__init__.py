"""What an expanded layer costs without a clock: predictions of the cost model, memory, books of weights."""
