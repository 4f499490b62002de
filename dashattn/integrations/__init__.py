"""DashAttention and its rivals inside other libraries; a module a library, which imports it."""
