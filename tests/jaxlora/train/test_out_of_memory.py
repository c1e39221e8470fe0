"""A lack of memory is told with what lacks it and what to change; every other error of XLA's passes as it is."""

import jax
import pytest

from jaxlora.train.out_of_memory import OutOfMemoryError, explained


def raised(said):
    with explained("steps"):
        raise jax.errors.JaxRuntimeError(said)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Out of memory while trying to allocate 3221225472 bytes.", "device's memory, of which 3.0 GiB more were wanted"),
        ("Failed to allocate request for 3.00GiB (3221225472B) on device ordinal 0", "device's memory, of which 3.0 GiB more were wanted"),
        ("Out of memory.", "device's memory, of which as XLA says: RESOURCE_EXHAUSTED: Out of memory."),
        ("Out of host memory while trying to allocate 3221225472 bytes", "pinned host memory, of which 3.0 GiB more were wanted"),
    ],
)
def test_a_shortage_is_told_in_gib(said, told):
    with pytest.raises(OutOfMemoryError, match=rf"^steps do not fit into (the )?{told}") as caught:
        raised(f"RESOURCE_EXHAUSTED: {said}")
    assert ("per_device_train_batch_size" in str(caught.value)) == ("device" in told)
    assert ("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB" in str(caught.value)) == ("host" in told)


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a fault"):
        raised("INTERNAL: a fault")
