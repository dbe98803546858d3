/* evmp._native: what a process asks of Linux about itself, and test hooks. */
#include "native.h"

#include <fcntl.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ring.h"

enum { RENAME_EXCHANGE_FLAG = 2 };  // of linux/fs.h, which clashes with libc's

PyDoc_STRVAR(die_with_parent_doc,
"die_with_parent()\n--\n\n"
"Ask the kernel to SIGKILL this process when its parent thread dies.");

static PyObject *die_with_parent(PyObject *Py_UNUSED(module),
                                 PyObject *Py_UNUSED(none))
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(adopt_orphans_doc,
"adopt_orphans()\n--\n\n"
"Become the parent of descendants whose own parent dies.");

static PyObject *adopt_orphans(PyObject *Py_UNUSED(module),
                               PyObject *Py_UNUSED(none))
{
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(keep_memory_doc,
"keep_memory()\n--\n\n"
"Have malloc keep what is freed for the next allocation, however large.\n\n"
"A network allocates and frees the same megabytes for each batch; where they\n"
"go back to the system in between, every page is faulted in again.");

static PyObject *keep_memory(PyObject *Py_UNUSED(module),
                             PyObject *Py_UNUSED(none))
{
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
#endif
    Py_RETURN_NONE;
}

PyDoc_STRVAR(exchange_doc,
"exchange(one, other, /)\n--\n\n"
"Have two paths change places in one step, whatever is there: renameat2(2).\n\n"
"Raises: OSError, with EINVAL or ENOSYS where the file system or the kernel\n"
"cannot do it.");

static PyObject *exchange(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *one = NULL, *other = NULL;
    if (!PyArg_ParseTuple(args, "O&O&:exchange", PyUnicode_FSConverter, &one,
                          PyUnicode_FSConverter, &other)) {
        Py_XDECREF(one);
        return NULL;
    }
    long failed;
    Py_BEGIN_ALLOW_THREADS
    // By its number: the C libraries of some platforms have no name for it.
    failed = syscall(SYS_renameat2, AT_FDCWD, PyBytes_AS_STRING(one), AT_FDCWD,
                     PyBytes_AS_STRING(other), RENAME_EXCHANGE_FLAG);
    Py_END_ALLOW_THREADS
    Py_DECREF(one);
    Py_DECREF(other);
    if (failed) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_process_name_doc,
"set_process_name(name, /)\n--\n\n"
"Set what `ps -o comm` and `top` show; the first 15 bytes count.");

static PyObject *set_process_name(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL) {
        return NULL;
    }
    if (prctl(PR_SET_NAME, text, 0, 0, 0) != 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_fault_doc,
"set_fault(reciprocal, seed, /)\n--\n\n"
"Test hook: SIGKILL this process between two steps of the ring's protocol,\n"
"with a chance of 1 in `reciprocal`; 0 never does.");

static PyObject *set_fault(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned int reciprocal;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "IK:set_fault", &reciprocal, &seed)) {
        return NULL;
    }
    ring_set_fault(reciprocal, seed);
    Py_RETURN_NONE;
}

static PyMethodDef process_methods[] = {
    {"die_with_parent", die_with_parent, METH_NOARGS, die_with_parent_doc},
    {"adopt_orphans", adopt_orphans, METH_NOARGS, adopt_orphans_doc},
    {"exchange", exchange, METH_VARARGS, exchange_doc},
    {"keep_memory", keep_memory, METH_NOARGS, keep_memory_doc},
    {"set_process_name", set_process_name, METH_O, set_process_name_doc},
    {"set_fault", set_fault, METH_VARARGS, set_fault_doc},
    {NULL, NULL, 0, NULL},
};

int native_add_process(PyObject *module)
{
    return PyModule_AddFunctions(module, process_methods);
}
