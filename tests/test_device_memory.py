"""What does not fit ends in one error that names the batch; other errors stay as they are."""

import jax
import jax.numpy as jnp
import pytest

from cdetr_jax.device_memory import must_fit


def test_what_does_not_fit_names_the_batch_and_the_remedy():
    message = r"^7 picture\(s\) of 3 x 5 pixels .*; use less \(RESOURCE_EXHAUSTED: [^\n]*\)$"
    with pytest.raises(MemoryError, match=message), must_fit(7, 3, 5, "use less"):
        jnp.zeros((10**7, 10**7)).block_until_ready()


def test_a_program_that_was_under_way_has_no_status_of_its_own_for_it():
    with pytest.raises(MemoryError, match=r"^7 picture\(s\)"), must_fit(7, 3, 5, "use less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 8 bytes.")


def test_other_errors_stay_as_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a defect"), must_fit(7, 3, 5, "use less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")
