"""Bundles on the Hugging Face Hub: pushed as one commit, opened by id, a task's files fetched and no others."""
