"""gym-nats under its own names: `NatsEnv`, `Channels`, `numpy_encode`, `numpy_decode`."""

from longrein.link.dialects.gym_nats import Channels, NatsEnv, numpy_decode, numpy_encode

__all__ = ["Channels", "NatsEnv", "numpy_decode", "numpy_encode"]
