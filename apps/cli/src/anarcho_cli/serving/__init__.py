"""A model behind HTTP, in the form that clients of OpenAI's interface expect; needs the extra `serve`."""
