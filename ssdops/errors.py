"""The exceptions of ssdops: each message says what is wrong, what was expected, what came, and what to do."""


class SsdopsError(Exception):
    """Base of every error that ssdops raises on purpose."""


class ShapeError(SsdopsError, ValueError):
    """Ranks, sizes or head counts that disagree."""


class DtypeError(SsdopsError, TypeError):
    """A tensor whose dtype cannot play its part (integers where floats belong, complex numbers anywhere)."""


class DeviceError(SsdopsError, ValueError):
    """Tensors of one call that live on different devices."""


class ValueRangeError(SsdopsError, ValueError):
    """Values that break a promise, such as `cu_seqlens` that decrease."""


class MaskError(SsdopsError, ValueError):
    """A mask expression that is not well formed."""


class ParseError(MaskError):
    """Text that is not a mask expression."""


class UnsupportedError(SsdopsError, NotImplementedError):
    """A backend that cannot run what was asked; the message says why and which backends can."""


class UnknownBackendError(SsdopsError, ValueError):
    """A backend name that nothing is registered under."""


class RegistrationError(SsdopsError, ValueError):
    """A mask or a backend that cannot be registered: its name is taken, or something is missing."""


class TuningError(SsdopsError, ValueError):
    """A tuning mode, budget, file or workload that is not one."""


class ConfigError(SsdopsError, ValueError):
    """An environment variable whose value is none that it can have."""


class RankError(SsdopsError, RuntimeError):
    """Ranks of a process group that do not make one call together: unlike slices, or a rank that is gone."""
