"""Live backbone and trained head as one policy; simulators; closed-loop evaluation."""
