"""The report: tables, figures, documents, and one self-contained page."""
