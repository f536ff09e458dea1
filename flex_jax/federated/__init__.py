"""Federated training: who owns which adapter, what a client does in a round, what the server does with it."""
