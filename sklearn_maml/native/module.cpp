// The Python module: which instruction sets this processor has, and the kernels for each of them.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

namespace {

bool always() { return true; }
#if HAS_X86_LEVELS
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Level {
    const char *name;
    bool (*runs)();
    const Kernels *kernels[2]; // of float, of double
};
#define LEVEL(name, label, runs) {label, runs, {&KERNELS(name, float), &KERNELS(name, double)}}
// the more a processor has, the later
const Level levels[] = {
#if defined(__x86_64__)
    LEVEL(base, "sse2", always),
#elif defined(__aarch64__)
    LEVEL(base, "neon", always),
#else
    LEVEL(base, "plain", always),
#endif
#if HAS_X86_LEVELS
    LEVEL(avx2, "avx2", has_avx2),
    LEVEL(avx512, "avx512", has_avx512),
#endif
};
const int n_levels = sizeof(levels) / sizeof(levels[0]);

PyObject *call(PyObject *args, Function *Kernels::*function, int n_arguments = N_ARGUMENTS) {
    int level, is_double;
    Py_buffer given;
    if (!PyArg_ParseTuple(args, "ipy*", &level, &is_double, &given)) return NULL;
    if (level < 0 || level >= n_levels || !levels[level].runs() || given.len != n_arguments * 8) {
        PyErr_Format(PyExc_ValueError, "Got level %d of %d, and %zd bytes of arguments; expected %d.", level,
                     n_levels, given.len, n_arguments * 8);
        PyBuffer_Release(&given);
        return NULL;
    }
    bool done;
    Py_BEGIN_ALLOW_THREADS;
    done = (levels[level].kernels[is_double]->*function)((const int64_t *)given.buf);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&given);
    if (done) Py_RETURN_NONE;
    PyErr_SetString(PyExc_MemoryError, "There is not enough memory for the compiled kernels.");
    return NULL;
}

PyObject *meta_step(PyObject *, PyObject *args) { return call(args, &Kernels::meta_step); }
PyObject *adapt(PyObject *, PyObject *args) { return call(args, &Kernels::adapt); }
PyObject *predict(PyObject *, PyObject *args) { return call(args, &Kernels::predict); }
PyObject *head_step(PyObject *, PyObject *args) { return call(args, &Kernels::head_step, head::N_ARGUMENTS); }
PyObject *head_pack(PyObject *, PyObject *args) { return call(args, &Kernels::head_pack, posterior::N_ARGUMENTS); }
PyObject *head_condition(PyObject *, PyObject *args) {
    return call(args, &Kernels::head_condition, posterior::N_ARGUMENTS);
}
PyObject *head_query(PyObject *, PyObject *args) { return call(args, &Kernels::head_query, posterior::N_ARGUMENTS); }

int fill(PyObject *module) {
#if HAS_X86_LEVELS
    __builtin_cpu_init();
#endif
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < n_levels && levels[i].runs(); i++) {
        PyObject *name = PyUnicode_FromString(levels[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    int failed = !names || PyModule_AddObjectRef(module, "LEVELS", names) ||
                 PyModule_AddStringConstant(module, "SOURCES", SOURCES);
    Py_XDECREF(names);
    return failed ? -1 : 0;
}

PyMethodDef methods[] = {{"meta_step", meta_step, METH_VARARGS, NULL},
                         {"adapt", adapt, METH_VARARGS, NULL},
                         {"predict", predict, METH_VARARGS, NULL},
                         {"head_step", head_step, METH_VARARGS, NULL},
                         {"head_pack", head_pack, METH_VARARGS, NULL},
                         {"head_condition", head_condition, METH_VARARGS, NULL},
                         {"head_query", head_query, METH_VARARGS, NULL},
                         {NULL, NULL, 0, NULL}};
PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)fill}, {0, NULL}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, slots, NULL, NULL, NULL};

} // namespace

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
