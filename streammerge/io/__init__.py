"""Checkpoints in and out: a streaming reader, a streaming writer. Neither holds more than one tensor."""
