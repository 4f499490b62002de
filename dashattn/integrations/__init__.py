"""DashAttention and its rivals inside other libraries; modules begin with the name of the library."""
