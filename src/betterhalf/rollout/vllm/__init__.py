"""The real vLLM in a process of its own: `engine` is the run's side and never imports it, `server` is the child's."""
