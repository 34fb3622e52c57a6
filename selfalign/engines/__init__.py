"""Engines that generate text: transformers in this process, vLLM, servers, and the protocol they share."""
