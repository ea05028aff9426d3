"""Generates vitq.v1 from the repository's proto/ while the package is built; nothing generated is
kept beside the sources."""

import shutil
from pathlib import Path

from grpc_tools import protoc
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
# Source distributions carry a copy.
PROTO = next(path for path in [HERE / "proto", HERE.parents[1] / "proto"] if path.is_dir())


class Generate(build_py):
    def run(self) -> None:
        super().run()
        files = sorted(str(path) for path in (PROTO / "vitq/v1").glob("*.proto"))
        out = self.build_lib
        options = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
        builtin = Path(protoc.__file__).parent / "_proto"
        if protoc.main(["protoc", f"-I{PROTO}", f"-I{builtin}", *options, *files]) != 0:
            raise SystemExit("protoc failed, see above")
        Path(out, "vitq/v1/__init__.py").write_text('"""The generated API."""\n')


class WithProtos(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(PROTO, Path(base_dir, "proto"))


setup(cmdclass={"build_py": Generate, "sdist": WithProtos})
