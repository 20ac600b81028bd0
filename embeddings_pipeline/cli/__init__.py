"""The command line: one module a command or group of commands. They parse, call the rooms below, and print.

Nobody imports it; `embeddings-pipeline` and `python -m embeddings_pipeline` start it.
"""
