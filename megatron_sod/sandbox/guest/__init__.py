"""Code that runs on the guest side: zygote, supervisor, runner. Standard library only.

None of it is imported by the trainer. A fresh interpreter starts `zygote.main`, which isolates
itself, imports the preloaded modules, and forks once per call; see docs/sandbox.md.
"""
