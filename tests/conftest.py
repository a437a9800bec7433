import os

# The programs here run for a few steps: compiling them takes the time. Read
# when JAX is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
