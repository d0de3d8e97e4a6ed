"""An environment that lives elsewhere: wires and environments. No torch, no algorithm, no experiment."""
