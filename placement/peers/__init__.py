"""Other planners, run in their own environments and judged the same way."""
