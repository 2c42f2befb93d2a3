"""The parts of `books_learning.py`: its data, its jobs, what the jobs train with, and the pictures of what they learned."""
