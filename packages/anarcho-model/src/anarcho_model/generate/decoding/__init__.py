"""Reading a few new tokens of each row; one module per framework."""
