"""The draft: EAGLE-3 head, test-time-training unroll, losses, draft vocabulary, acceptance measures, export."""
