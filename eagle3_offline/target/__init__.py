"""The target model: the engine protocol, its engines, the fingerprint, and the demo's own targets."""
