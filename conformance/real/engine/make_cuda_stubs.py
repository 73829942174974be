"""Do-nothing stand-ins for the CUDA libraries that PyPI's torch is linked against.  usage: make_cuda_stubs.py SITE_PACKAGES

With them the wheel loads on a machine without a GPU and without the CUDA packages: every function answers
"no device", so torch finds none and uses the CPU. Needs gcc, readelf and nm; writes into torch/lib.
"""
import collections
import glob
import os
import re
import subprocess
import sys

CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nvrtc|nvshmem|nvJit|nvToolsExt)")
# Which library an unversioned symbol belongs to, by the start of its name; the first match counts.
PREFIXES = [
    ("cudart", r"_*cuda[A-Z_]|__cuda"), ("cupti", "cupti"), ("curand", "curand"), ("cufile", "cuFile"),
    ("cusparseLt", "cusparseLt"), ("cusolver", "cusolver"), ("cublasLt", "cublasLt"), ("cublas", "cublas"),
    ("cusparse", "cusparse"), ("cufft", "cufft"), ("cudnn", "cudnn"), ("nccl", "nccl|pnccl"), ("nvrtc", "nvrtc"),
    ("nvshmem", "nvshmem|_nvshmem"), ("cudart", "cu[A-Z]"),
]
TEXT = {"cudaGetErrorString", "cudaGetErrorName", "cublasGetStatusString", "cudnnGetErrorString",
        "ncclGetErrorString", "ncclGetLastError", "cusparseGetErrorString", "nvrtcGetErrorString"}
ZERO = {"cudaGetLastError", "cudaPeekAtLastError"}
COUNT = {"cudaGetDeviceCount": 100, "cudaDriverGetVersion": 0, "cudaRuntimeGetVersion": 0}


def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def symbols(binaries):
    """Libraries needed, symbols wanted, symbols the binaries define themselves."""
    needed, wanted, defined = set(), set(), set()
    for binary in binaries:
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", binary)))
        wanted |= {line.split()[-1] for line in run("nm", "-D", "--undefined-only", binary).splitlines()}
        defined |= {line.split()[-1].split("@")[0] for line in run("nm", "-D", "--defined-only", binary).splitlines()}
    return needed, wanted, defined


def assign(libraries, wanted, defined):
    """Symbols by library, and the version node of those libraries that version their symbols."""
    by_library, version = collections.defaultdict(set), {}
    for symbol in wanted:
        name, _, node = symbol.partition("@")
        node = node.lstrip("@")
        if name in defined:
            continue
        if node in libraries:
            by_library[node].add(name)
            version[node] = node
        elif not node or node == "NVSHMEM":  # other nodes are the C and C++ run-time libraries'
            stem = next((stem for stem, pattern in PREFIXES if re.match(pattern, name)), None)
            found = [x for x in libraries if stem and re.match(rf"lib{stem}(_host)?\.so", x)]
            if found:
                by_library[found[0]].add(name)
                if node:
                    version[found[0]] = node
    return by_library, version


def function(name):
    """C source of one stand-in."""
    if name in TEXT:
        return f'const char *{name}(void){{return "no CUDA here";}}'
    if name == "__cudaRegisterFatBinary":
        return "static void *handle[8]; void **__cudaRegisterFatBinary(void *x){return handle;}"
    if name.startswith("__cuda") or name in ZERO:
        return f"int {name}(void){{return 0;}}"
    if name in COUNT:
        return f"int {name}(int *n){{if(n)*n=0; return {COUNT[name]};}}"
    return f"int {name}(void){{return 100;}}"  # cudaErrorNoDevice


def build(folder, library, names, node):
    source, script = f"{folder}/{library}.c", f"{folder}/{library}.map"
    with open(source, "w") as out:
        out.write("\n".join(map(function, sorted(names))) + "\n")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", f"-Wl,-soname,{library}",
               "-o", f"{folder}/{library}", source]
    if node:
        with open(script, "w") as out:
            out.write(f"{node} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, check=True)
    for leftover in filter(os.path.exists, (source, script)):
        os.remove(leftover)


def main():
    packages = sys.argv[1]
    folder = f"{packages}/torch/lib"
    needed, wanted, defined = symbols(glob.glob(f"{folder}/*.so") + glob.glob(f"{packages}/torch/_C*.so"))
    libraries = sorted(x for x in needed if x != "libcuda.so.1" and CUDA_LIBRARY.match(x))
    by_library, version = assign(libraries, wanted, defined)
    for library in libraries:
        build(folder, library, by_library[library], version.get(library))
        print(library, len(by_library[library]))


main()
