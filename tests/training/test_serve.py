"""What the children call a failure: the daemon counts an attempt of the file, or waits until it is mended."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from longrun import examine, wire
from longrun.home import Home
from longrun.training import serve

NO_FILES_FAULT = ("ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "ENOMEM")
PERHAPS_A_FILES = ("EIO", "EACCES", "EISDIR")
KINDS = dict.fromkeys(NO_FILES_FAULT, "disk") | dict.fromkeys(PERHAPS_A_FILES, "crash")
HOME = Home(Path("/home"))


def refused(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


@pytest.fixture
def task():
    return wire.Train(
        plan={"job": 7},
        prepared="",
        checkpoint=None,
        lineage="",
        base_model="",
        save_steps=1,
        save_total_limit=1,
        logging_steps=1,
        row_log=False,
    )


@pytest.mark.parametrize("name", KINDS)
def test_no_file_is_to_blame_for_what_the_system_refuses_the_worker(task, name):
    """It reads nothing but what was prepared, and writes into the home."""
    error = refused(name)
    error.filename = "/home/current_model/checkpoint-1"
    failed = serve._in_words(task, error, HOME)
    assert (failed.job, failed.kind) == (7, "disk")


ELSEWHERE = (
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "gcc"),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/.triton"),
    ConnectionError("no answer from the server that curves are reported to"),
    TimeoutError(),
)


@pytest.mark.parametrize("error", ELSEWHERE, ids=repr)
def test_what_is_refused_outside_the_home_is_told_as_what_is_trained_with(task, error):
    failed = serve._in_words(task, error, HOME)
    assert (failed.kind, type(error).__name__ in failed.why) == ("base model", True)


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/c10/cuda/CUDACachingAllocator.cpp":1131'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_whoever_finds_no_memory_the_batch_is_to_be_halved(task, error):
    assert serve._in_words(task, error, HOME).kind == "out of memory"


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_preparer_tells_what_no_file_is_to_blame_for(monkeypatch, name, kind):
    def fail(*_, **__):
        raise refused(name)

    monkeypatch.setattr(examine, "examine", fail)
    task = wire.Examine(job=7, path="x.jsonl", on_bad_row="reject", max_line_bytes=100)
    failed = serve.Preparer(channel=None).do(task)
    assert (failed.job, failed.kind) == (7, kind)


@pytest.mark.parametrize(("allowed", "left"), {None: "0", "2,3": "2", "1": "1", "": ""}.items())
def test_a_single_process_keeps_to_the_first_gpu_that_it_may_see(monkeypatch, allowed, left):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    serve.keep_to_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
