"""What the stack does on this machine: training steps, generation and the tokenizer, measured beside their forecasts."""
