"""Jobs about the methods themselves: error against cost, memory and time, other libraries."""
