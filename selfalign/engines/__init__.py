"""Engines that engine text: transformers in this process, vLLM, servers, and the protocol they share."""
