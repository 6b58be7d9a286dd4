"""What layers do without a framework: checks, dropout keys, tables of positions. Both backends' `nn` use it."""
