"""The lab: what can be proved of a kernel with no GPU at hand."""
