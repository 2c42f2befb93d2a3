"""Log-probabilities of given tokens without the whole matrix of logits; one module per framework."""
