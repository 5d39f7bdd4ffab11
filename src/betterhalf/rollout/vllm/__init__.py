"""vLLM in its own process: `engine` is the run's side and never imports vLLM, `server` runs in the child process."""
