"""Phase one: the target answers, its hidden states go to the store, the dump is sealed."""
