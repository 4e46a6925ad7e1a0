"""Phase two: the draft trains with DeepSpeed ZeRO, purely from a sealed dump."""
