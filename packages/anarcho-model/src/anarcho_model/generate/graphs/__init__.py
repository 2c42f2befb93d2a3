"""Steps that a GPU repeats without being told each operation anew; one module per framework."""
