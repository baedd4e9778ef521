"""What an op list takes: bytes and seconds."""
