"""Records from a file or the Hub, their prompts, their partition into clients, and the batches of a round."""
