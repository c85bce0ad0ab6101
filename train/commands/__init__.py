"""The trainer's commands: options, and what is printed. The work is imported in `main`."""
