"""Drawing the next token from logits; one module for each framework."""
