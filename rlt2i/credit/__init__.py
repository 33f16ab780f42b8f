"""Credit assignment: an advantage times allocations, on the steps and places that the masks keep."""
