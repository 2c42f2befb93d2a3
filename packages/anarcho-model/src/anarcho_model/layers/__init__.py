"""The layers that the GPT is made of; one module per framework."""
