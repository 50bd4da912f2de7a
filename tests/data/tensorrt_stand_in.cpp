// Stands in for the libraries under TensorRT's Python bindings, so that the real bindings can be called
// without a GPU. Every factory answers with one object, and every virtual function of it answers with the
// object again. Its address, 2^32 + 1, makes it a valid answer of other types too: as a bool it is true, as a
// 32-bit integer 1 (one tensor, of the mode "input", of the type "half"), and read as a C string it is "". A
// function that returns a struct by value is known by its first argument, which is then no object but a place
// for the struct: an empty Dims is left there. Only as a size_t the address makes no sense.
// So it checks names, arguments and types of calls, and nothing else. Compiled with -DNOTHING the factories
// answer with null, as without a driver.

#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include <typeinfo>

namespace {

constexpr std::uintptr_t kPlace = 0x100000000;
constexpr std::uintptr_t kObject = kPlace + 1;
constexpr std::uintptr_t kTable = kPlace + 0x1000;  // its low byte is 0: the object as a string is empty
constexpr std::size_t kBytes = 0x4000;
constexpr int kFunctions = 1000;

struct Anything {
    virtual ~Anything() {}
};

void* answer(void* first) {
    if (reinterpret_cast<std::uintptr_t>(first) != kObject) {
        std::memset(first, 0, 8);
        return first;
    }
    return reinterpret_cast<void*>(kObject);
}

void* make() {
    auto* table = reinterpret_cast<void**>(kTable);
    auto* object = reinterpret_cast<char*>(kObject);
    void* wanted = reinterpret_cast<void*>(kPlace);
    void* place = mmap(wanted, kBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (place != wanted) return object;  // made before, by this library or by its sister
    table[-2] = nullptr;  // offset to the whole object, read by dynamic_cast
    table[-1] = const_cast<std::type_info*>(&typeid(Anything));
    for (int i = 0; i < kFunctions; ++i) table[i] = reinterpret_cast<void*>(&answer);
    void* words[] = {table, object, object, object, object, object, object, object};
    std::memcpy(object, words, sizeof words);  // the vtable, and the implementation that API classes hold
    return object;
}

}  // namespace

extern "C" {
#ifdef NOTHING
#define FACTORY(name) void* name() { return nullptr; }
#else
#define FACTORY(name) void* name() { return make(); }
#endif
FACTORY(createInferBuilder_INTERNAL)
FACTORY(createInferRuntime_INTERNAL)
FACTORY(createInferRefitter_INTERNAL)
FACTORY(getPluginRegistry)
FACTORY(getBuilderPluginRegistry)
FACTORY(createNvOnnxParser_INTERNAL)
FACTORY(createNvOnnxParserRefitter_INTERNAL)
int getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins() { return true; }
// The Caffe and UFF parsers that the bindings of 8.6 still link.
void _ZN11nvuffparser15createUffParserEv() {}
void _ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi() {}
void _ZN14nvcaffeparser117createCaffeParserEv() {}
void _ZN14nvcaffeparser123shutdownProtobufLibraryEv() {}
}
