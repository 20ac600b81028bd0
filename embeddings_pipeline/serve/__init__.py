"""The HTTP service: searches for programs that speak HTTP, and for agents that speak MCP. It imports no Dagster, and
needs the extra `serve`.
"""
