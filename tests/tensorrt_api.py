"""Which names the Python bindings of TensorRT have, version by version, so that the fake has those and no others.

`python tests/tensorrt_api.py` writes `tensorrt_api.json` anew. The bindings are NVIDIA's wheels; names need no GPU and
no TensorRT, so the libraries that they link are empty ones. Needs pip, gcc and an installed `tensorrt_rtx`.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
WHEELS = ("10.14.1.48.post1", "10.15.1.29", "11.0.0.114", "11.4.0.106")
CLASSES = [
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "IStreamReader",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "LayerType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
]
"""What `cxr_triton.engines` uses, and where TensorRT 11 removed most."""
LINKED = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]


def names(module) -> dict[str, list[str]]:
    """Public names of each class in `CLASSES` that a module has."""
    return {
        name: [attribute for attribute in dir(getattr(module, name)) if not attribute.startswith("_")]
        for name in CLASSES
        if hasattr(module, name)
    }


def read() -> dict[str, dict[str, set[str]]]:
    """The record: version, class, names."""
    return {
        version: {name: set(found) for name, found in classes.items()}
        for version, classes in json.loads(RECORD.read_text()).items()
    }


def _of_wheel(version: str, folder: Path) -> dict[str, list[str]]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, f"tensorrt-cu13-bindings=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in LINKED))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{version.partition('.')[0]}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-o", folder / name, source, f"-Wl,-soname,{name}"], check=True
        )
    code = "import json, tensorrt_bindings, tensorrt_api; print(json.dumps(tensorrt_api.names(tensorrt_bindings)))"
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{Path(__file__).parent}"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return json.loads(said.stdout)


def main() -> None:
    import tensorrt_rtx

    record = {tensorrt_rtx.__version__: names(tensorrt_rtx)}
    for version in WHEELS:
        with tempfile.TemporaryDirectory() as folder:
            record[version] = _of_wheel(version, Path(folder))
    lines = [
        f' "{version}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(found)}' for name, found in classes.items())
        + "\n }"
        for version, classes in record.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
