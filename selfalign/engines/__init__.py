"""Who writes text: the transformers loop, vLLM, servers, and the protocol they share."""
