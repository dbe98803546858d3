/* evmp._native with nothing in it but the ring: quick to build, mutated. */
#include "native.h"

static int ring_module_exec(PyObject *module)
{
    return native_add_process(module) < 0 || native_add_ring(module) < 0 ? -1
                                                                         : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)ring_module_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "evmp._native",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
