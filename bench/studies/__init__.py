"""The paper's experiments, each a function from settings to raw rows."""
