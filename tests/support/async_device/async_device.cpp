// The simulated device as one of torch's accelerators, by the names that torch has for devices of others
// (PrivateUse1).
//
// [Note: Kernels]
// There are none of its own. What is called for tensors of the device is put on the current stream; there,
// the CPU's kernel runs on CPU tensors that are views of the device's memory (`view_for_kernels`). The
// calling thread must know the shapes of new results at once: it asks torch's kernels for the meta device. An
// operation whose result depends on values waits for the stream first. What is queued owns no memory of the
// device, as on a real one: a tensor that is freed too early is reused too early.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_copy_from.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <unordered_set>

#include "runtime.h"

namespace async_device {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

Stream& stream_of(const c10::Stream& stream) {
    return device(stream.device_index()).stream(int(stream.id()));
}

c10::Stream stream_for_torch(const Stream& stream) {
    const c10::Device where(kType, c10::DeviceIndex(stream.device));
    return c10::Stream(c10::Stream::UNSAFE, where, stream.index);
}

void raise_failure() {
    const std::string failure = take_failure();
    TORCH_CHECK(failure.empty(), failure);
}

void wait_for(Stream& stream) {
    stream.wait(stream.last());
    raise_failure();
}

// ---------------------------------------------------------------- what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kType; }
    c10::Device exchangeDevice(c10::Device to) const override {
        const c10::Device before = getDevice();
        set_current_device(to.index());
        return before;
    }
    c10::Device getDevice() const override { return {kType, c10::DeviceIndex(current_device())}; }
    void setDevice(c10::Device to) const override {
        TORCH_CHECK(to.index() >= 0 && to.index() < kNumDevices, "there is no device ", to);
        set_current_device(to.index());
    }
    void uncheckedSetDevice(c10::Device to) const noexcept override { set_current_device(to.index()); }
    c10::DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
    void synchronizeDevice(c10::DeviceIndex index) const override {
        device(index).synchronize();
        raise_failure();
    }

    c10::Stream getStream(c10::Device of) const override {
        return stream_for_torch(current_stream(index_of(of)));
    }
    c10::Stream getDefaultStream(c10::Device of) const override {
        return stream_for_torch(device(index_of(of)).stream(0));
    }
    c10::Stream getStreamFromGlobalPool(c10::Device of, bool) const override {
        return stream_for_torch(device(index_of(of)).next_of_pool());
    }
    c10::Stream getNewStream(c10::Device of, int) const override {
        return getStreamFromGlobalPool(of, false);
    }
    c10::Stream exchangeStream(c10::Stream to) const override {
        const c10::Stream before = getStream(to.device());
        set_current_stream(stream_of(to));
        return before;
    }
    bool queryStream(const c10::Stream& which) const override {
        Stream& stream = stream_of(which);
        return stream.query(stream.last());
    }
    void synchronizeStream(const c10::Stream& which) const override { wait_for(stream_of(which)); }

    void record(void** event, const c10::Stream& on, c10::DeviceIndex, c10::EventFlag) const override {
        if (*event == nullptr) *event = new Mark;
        *static_cast<Mark*>(*event) = Mark::of(stream_of(on));
    }
    void block(void* event, const c10::Stream& which) const override {
        if (event != nullptr) static_cast<Mark*>(event)->hold_up(stream_of(which));
    }
    bool queryEvent(void* event) const override {
        return event == nullptr || static_cast<Mark*>(event)->query();
    }
    void synchronizeEvent(void* event) const override {
        if (event != nullptr) static_cast<Mark*>(event)->wait();
        raise_failure();
    }
    double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
        const auto* begin = static_cast<Mark*>(from);
        const auto* end = static_cast<Mark*>(to);
        TORCH_CHECK(begin != nullptr && end != nullptr && begin->is_reached() && end->is_reached(),
                    "both events must be recorded and over before the time between them is known");
        return double(end->reached_ns->load() - begin->reached_ns->load()) / 1e6;
    }
    void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
        delete static_cast<Mark*>(event);
    }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& on) const override {
        if (auto* block = static_cast<Block*>(data.get_context()))
            device(block->device).record(block, stream_of(on));
    }

  private:
    static int index_of(c10::Device of) { return of.has_index() ? of.index() : current_device(); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Allocator final : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t nbytes) override {
        const int index = current_device();
        const c10::Device where(kType, c10::DeviceIndex(index));
        if (nbytes == 0) return {nullptr, where};
        Block* block = device(index).allocate(nbytes, current_stream(index));
        TORCH_CHECK_WITH(OutOfMemoryError, block != nullptr, "the simulated device ", index, " has no ",
                         nbytes, " bytes left of ", options.capacity_nbytes.load());
        return {device(index).address_of(*block), block, &give_back, where};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
    void copy_data(void* to, const void* from, size_t nbytes) const override {
        Device* owner = owner_of(to);
        void* target = owner->seen_by_kernels(to);
        void* source = owner_of(from)->seen_by_kernels(from);
        current_stream(current_device()).submit(Kind::kCopy, "copy_data", nbytes, [=] {
            std::memcpy(target, source, nbytes);
        });
    }

    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {
        for (int index = 0; index < kNumDevices; ++index) device(index).empty_cache();
    }
    void recordStream(const c10::DataPtr& data, c10::Stream on) override {
        Guard().recordDataPtrOnStream(data, on);
    }
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
        const MemoryStatistics found = device(index).statistics();
        c10::CachingDeviceAllocator::DeviceStats said;
        said.allocated_bytes[0].current = said.active_bytes[0].current = found.allocated;
        said.allocated_bytes[0].peak = said.active_bytes[0].peak = found.peak_allocated;
        said.reserved_bytes[0].current = found.reserved;
        said.reserved_bytes[0].peak = found.peak_reserved;
        return said;
    }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex index) override { device(index).reset_peaks(); }
    std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
        const auto total = size_t(options.capacity_nbytes.load());
        return {total - size_t(device(index).statistics().reserved), total};
    }

  private:
    static void give_back(void* context) {
        auto* block = static_cast<Block*>(context);
        device(block->device).free(block);
    }
};
Allocator& allocator = *new Allocator;
REGISTER_ALLOCATOR(kType, &allocator)

struct LockedAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t nbytes) override {
        if (nbytes == 0) return {nullptr, at::kCPU};
        void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        TORCH_CHECK_WITH(OutOfMemoryError, memory != MAP_FAILED, "no ", nbytes,
                         " bytes of page-locked memory");
        lock_host_memory(memory, nbytes);
        return {memory, new Span{memory, nbytes}, &give_back, at::kCPU};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, size_t nbytes) const override {
        default_copy_data(to, from, nbytes);
    }

  private:
    struct Span {
        void* memory;
        size_t nbytes;
    };
    static void give_back(void* context) {
        std::unique_ptr<Span> span(static_cast<Span*>(context));
        free_later(span->memory, span->nbytes);
    }
};

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return kNumDevices; }
    void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice({kType, index}); }
    c10::DeviceIndex getCurrentDevice() const override { return c10::DeviceIndex(current_device()); }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
        return Guard().exchangeDevice({kType, index}).index();
    }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
        return index < 0 ? getCurrentDevice() : exchangeDevice(index);
    }
    bool isPinnedPtr(const void* address) const override { return is_locked(address); }
    c10::Allocator* getPinnedMemoryAllocator() const override {
        static auto& locked = *new LockedAllocator;
        return &locked;
    }
    at::Device getDeviceFromPtr(void* address) const override {
        Device* owner = owner_of(address);
        TORCH_CHECK(owner != nullptr, "this is no address of a simulated device");
        return {kType, c10::DeviceIndex(owner->stream(0).device)};
    }
    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
        static auto& generator = *new at::Generator(at::detail::createCPUGenerator());
        return generator;
    }
    at::Generator getNewGenerator(c10::DeviceIndex) const override {
        return at::detail::createCPUGenerator();
    }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
        c10::DeviceGuard guard(storage.device());
        c10::DataPtr data = allocator.allocate(nbytes);
        const size_t kept = std::min(nbytes, storage.nbytes());
        if (kept > 0) allocator.copy_data(data.get(), storage.data(), kept);
        storage.set_data_ptr_noswap(std::move(data));
        storage.set_nbytes(nbytes);
    }
};

// ---------------------------------------------------------------- tensors for kernels

/// CPU tensors over the memory of others, which they do not own. Those of one storage share one.
class KernelViews {
  public:
    Tensor of(const Tensor& tensor) {
        const void* base = tensor.storage().data();
        const auto found =
            std::find_if(storages_.begin(), storages_.end(), [&](auto& e) { return e.first == base; });
        if (found != storages_.end()) return view(tensor, found->second);
        Device* owner = base == nullptr ? nullptr : owner_of(base);
        void* memory = owner == nullptr ? const_cast<void*>(base) : owner->seen_by_kernels(base);
        c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                             c10::DataPtr(memory, at::kCPU), nullptr, false);
        storages_.emplace_back(base, storage);
        return view(tensor, storage);
    }

  private:
    static Tensor view(const Tensor& tensor, c10::Storage storage) {
        auto made = at::detail::make_tensor<c10::TensorImpl>(
            std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
        auto* impl = made.unsafeGetTensorImpl();
        impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
        if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
        return made;
    }

    std::vector<std::pair<const void*, c10::Storage>> storages_;
};

Tensor new_tensor(IntArrayRef sizes, IntArrayRef strides, at::ScalarType dtype) {
    return Tensor(at::detail::empty_strided_generic(sizes, strides, &allocator, kKeys, dtype));
}

Tensor on_meta(const Tensor& tensor) {
    Tensor made(at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type()));
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
        made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
}

/// The CPU's scalars and indices may be given beside tensors of the device, and may change once the call is
/// over.
Tensor copied(const Tensor& tensor) {
    Tensor made = tensor.clone();
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
        made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
}

/// Return an argument with all its tensors replaced.
template <typename Replace>
IValue with_tensors(const IValue& value, const Replace& replace) {
    if (value.isTensor()) return value.toTensor().defined() ? IValue(replace(value.toTensor())) : value;
    if (value.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& each : value.toTensorVector())
            list.push_back(each.defined() ? replace(each) : each);
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (const std::optional<Tensor>& each : value.toOptionalTensorVector())
            list.push_back(each && each->defined() ? std::optional<Tensor>(replace(*each)) : each);
        return list;
    }
    return value;
}

/// Where a call must run, from its tensors and, if there are none, from the device it names.
c10::Device device_of(const OperatorHandle& op, const std::vector<IValue>& arguments) {
    std::optional<c10::Device> found;
    for (const IValue& argument : arguments)
        with_tensors(argument, [&](const Tensor& tensor) {
            if (is_ours(tensor)) {
                TORCH_CHECK(!found || *found == tensor.device(), op.schema().name(), ": tensors are on ",
                            *found, " and on ", tensor.device());
                found = tensor.device();
            }
            return tensor;
        });
    for (const IValue& argument : arguments)
        if (!found && argument.isDevice() && argument.toDevice().type() == kType) found = argument.toDevice();
    const auto index = found && found->has_index() ? found->index() : c10::DeviceIndex(current_device());
    return {kType, index};
}

// ---------------------------------------------------------------- operations

/// Run CPU kernels in the thread of a stream: below autograd, without threads that would compete with other
/// streams.
template <typename Kernels>
void run_kernel(const Kernels& kernels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::ParallelGuard alone(true);
    try {
        kernels();
    } catch (const c10::Error& error) {
        throw std::runtime_error(error.what_without_backtrace());
    }
}

bool is_written(const c10::Argument& argument) {
    return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

bool takes_generator(const c10::Argument& argument) {
    return argument.type()->str().find("Generator") != std::string::npos;
}

const std::unordered_set<std::string> kShapesDependOnValues = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::repeat_interleave",
    "aten::bincount",
};

/// One operation that was called for tensors of the device.
class Call {
  public:
    Call(const OperatorHandle& op, Stack& stack)
        : op_(op),
          schema_(op.schema()),
          stack_(stack),
          name_(schema_.name().substr(schema_.name().find(':') + 2)) {
        const size_t num = schema_.arguments().size();
        arguments_.assign(std::make_move_iterator(stack.end() - int64_t(num)),
                          std::make_move_iterator(stack.end()));
        stack.erase(stack.end() - int64_t(num), stack.end());
        device_ = device_of(op, arguments_);
    }

    void run() {
        c10::DeviceGuard guard(device_);
        if (!op_.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU))
            refuse("the CPU has no kernel for it");
        bool waits = kShapesDependOnValues.count(schema_.name()) == 1;
        for (const c10::Argument& result : schema_.returns()) {
            if (result.alias_info() != nullptr && !is_written(result)) refuse("it returns a view");
            const auto kind = result.type()->kind();
            waits |= kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType;
        }
        waits ? run_now() : queue();
    }

  private:
    [[noreturn]] void refuse(const std::string& why) const {
        TORCH_CHECK_NOT_IMPLEMENTED(false, schema_.name(), " is not there for the simulated device: ", why);
        std::abort();
    }

    /// Return the arguments with CPU tensors in the place of the device's.
    Stack for_kernel(KernelViews& views) const {
        Stack made;
        for (size_t i = 0; i < arguments_.size(); ++i) {
            const IValue& argument = arguments_[i];
            if (takes_generator(schema_.arguments()[i])) {
                made.emplace_back(at::detail::createCPUGenerator(seed_for(argument)));
            } else if (argument.isDevice() && argument.toDevice().type() == kType) {
                made.emplace_back(c10::Device(at::kCPU));
            } else {
                made.push_back(with_tensors(argument, [&](const Tensor& tensor) {
                    if (is_ours(tensor)) return views.of(tensor);
                    TORCH_CHECK(tensor.dim() == 0 || name_.find("index") != std::string::npos, schema_.name(),
                                ": a tensor is on ", tensor.device(), ", others are on ", device_);
                    return copied(tensor);
                }));
            }
        }
        return made;
    }

    uint64_t seed_for(const IValue& generator) const {
        if (generator.isNone()) return next_seed(device_.index());
        at::Generator given = generator.toGenerator();
        std::lock_guard<std::mutex> lock(given.mutex());
        return at::check_generator<at::CPUGeneratorImpl>(given)->random64();
    }

    /// Return what the operation returns on the meta device; refuses where torch does not know.
    Stack shapes() const {
        Stack made;
        for (size_t i = 0; i < arguments_.size(); ++i) {
            const IValue& argument = arguments_[i];
            if (takes_generator(schema_.arguments()[i]))
                made.emplace_back();
            else if (argument.isDevice() && argument.toDevice().type() == kType)
                made.emplace_back(c10::Device(at::kMeta));
            else
                made.push_back(with_tensors(argument, [](const Tensor& tensor) {
                    return is_ours(tensor) || tensor.dim() > 0 ? on_meta(tensor) : tensor;
                }));
        }
        try {
            op_.callBoxed(&made);
        } catch (const c10::NotImplementedError& error) {
            refuse("torch cannot tell its shapes without computing it");
        }
        return made;
    }

    /// Give outputs that were passed without a size theirs.
    void size_outputs() {
        bool has_empty = false;
        for (size_t i = 0; i < arguments_.size(); ++i)
            has_empty |= is_output(i) && arguments_[i].isTensor() && arguments_[i].toTensor().numel() == 0;
        if (!has_empty) return;
        Stack found = shapes();
        for (size_t i = 0, result = 0; i < arguments_.size(); ++i) {
            if (!is_output(i) || !arguments_[i].isTensor() || result == found.size()) continue;
            const Tensor wanted = found[result++].toTensor();
            const Tensor& given = arguments_[i].toTensor();
            if (given.sizes() != wanted.sizes()) given.resize_(wanted.sizes());
        }
    }

    bool is_output(size_t i) const {
        return schema_.arguments()[i].kwarg_only() && is_written(schema_.arguments()[i]);
    }

    /// Return the results, and push them for the caller: arguments that are written, or new tensors.
    std::vector<Tensor> push_results() {
        const auto& results = schema_.returns();
        std::vector<Tensor> made;
        Stack found;
        for (size_t i = 0; i < results.size(); ++i) {
            if (is_written(results[i])) {
                stack_.push_back(argument_of(results[i]));
                continue;
            }
            if (found.empty()) found = shapes();
            stack_.push_back(with_tensors(found[i], [&](const Tensor& shape) {
                made.push_back(new_tensor(shape.sizes(), shape.strides(), dtype_of(i, shape)));
                return made.back();
            }));
        }
        return made;
    }

    /// The CPU's normalisations keep means in the dtype of their input, which torch tells for other devices
    /// otherwise.
    at::ScalarType dtype_of(size_t result, const Tensor& shape) const {
        if (result == 0 || (name_ != "native_layer_norm" && name_ != "native_group_norm"))
            return shape.scalar_type();
        const at::ScalarType input = arguments_[0].toTensor().scalar_type();
        bool is_mixed = false;
        for (const IValue& argument : arguments_)
            if (argument.isTensor() && argument.toTensor().defined())
                is_mixed |= argument.toTensor().scalar_type() != input;
        return is_mixed ? at::kFloat : input;
    }

    const IValue& argument_of(const c10::Argument& result) const {
        for (size_t i = 0; i < arguments_.size(); ++i) {
            const auto* alias = schema_.arguments()[i].alias_info();
            if (alias != nullptr && *alias == *result.alias_info()) return arguments_[i];
        }
        refuse("its schema names no argument for a result");
    }

    void queue() {
        size_outputs();
        KernelViews views;
        Stack arguments = for_kernel(views);
        std::vector<Tensor> targets;
        for (const Tensor& made : push_results()) targets.push_back(views.of(made));
        std::vector<size_t> fresh;
        for (size_t i = 0; i < schema_.returns().size(); ++i)
            if (!is_written(schema_.returns()[i])) fresh.push_back(i);
        current_stream(device_.index())
            .submit(
                Kind::kKernel, name_, 0,
                [op = op_, arguments = std::move(arguments), targets = std::move(targets),
                 fresh = std::move(fresh)]() mutable { compute(op, std::move(arguments), targets, fresh); });
    }

    /// Run the CPU's kernel; in the stream's thread.
    static void compute(const OperatorHandle& op, Stack stack, const std::vector<Tensor>& targets,
                        const std::vector<size_t>& fresh) {
        std::vector<std::pair<Tensor, void*>> written;
        for (size_t i = 0; i < stack.size(); ++i)
            if (is_written(op.schema().arguments()[i]))
                with_tensors(stack[i], [&](const Tensor& tensor) {
                    written.emplace_back(tensor, tensor.numel() == 0 ? nullptr : tensor.data_ptr());
                    return tensor;
                });
        run_kernel([&] { op.callBoxed(&stack); });
        for (const auto& [tensor, memory] : written)
            TORCH_CHECK(memory == nullptr || tensor.data_ptr() == memory, "an output had another shape");
        size_t next = 0;
        for (const size_t result : fresh)
            with_tensors(stack[result], [&](const Tensor& tensor) {
                if (tensor.numel() == 0 &&
                    next < targets.size()) {  // what a normalisation saves only in training
                    ++next;
                    return tensor;
                }
                TORCH_CHECK(next < targets.size() && targets[next].sizes() == tensor.sizes(),
                            "a result has the shape ", tensor.sizes(), ", which torch had told otherwise");
                run_kernel([&] { targets[next++].copy_(tensor); });
                return tensor;
            });
    }

    /// Compute at once, after all that the current stream was given.
    void run_now() {
        Stream& stream = current_stream(device_.index());
        KernelViews views;
        Stack results = for_kernel(views);
        const auto compute = [&] { run_kernel([&] { op_.callBoxed(&results); }); };
        stream.wait(stream.submit(Kind::kKernel, name_, 0, compute));
        raise_failure();
        for (size_t i = 0; i < results.size(); ++i) {
            if (is_written(schema_.returns()[i])) {
                stack_.push_back(argument_of(schema_.returns()[i]));
                continue;
            }
            stack_.push_back(with_tensors(results[i], [&](const Tensor& tensor) {
                Tensor made = new_tensor(tensor.sizes(), tensor.strides(), tensor.scalar_type());
                stream.wait(
                    stream.submit(Kind::kOther, "store", 0, [target = KernelViews().of(made), &tensor] {
                        run_kernel([&] { target.copy_(tensor); });
                    }));
                return made;
            }));
        }
    }

    const OperatorHandle op_;
    const c10::FunctionSchema& schema_;
    Stack& stack_;
    std::string name_;
    std::vector<IValue> arguments_;
    c10::Device device_{kType, 0};
};

void call(const OperatorHandle& op, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Call(op, *stack).run();
}

// ---------------------------------------------------------------- operations with code of their own

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> on, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    c10::OptionalDeviceGuard guard(on);
    return Tensor(at::detail::empty_generic(sizes, &allocator, kKeys, c10::dtype_or_default(dtype), format));
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> on, std::optional<bool>) {
    c10::OptionalDeviceGuard guard(on);
    return new_tensor(sizes, strides, c10::dtype_or_default(dtype));
}

/// Copy between host and device or within the device; expands and converts as copy_ does.
Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
    if (target.numel() == 0) return target;
    const bool is_upload = !is_ours(source), is_download = !is_ours(target);
    const c10::Device on = is_download ? source.device() : target.device();
    c10::DeviceGuard guard(on);
    Stream& stream = current_stream(on.index());
    Stream* other = is_upload || is_download || source.device() == on
                        ? nullptr
                        : &current_stream(source.device().index());
    const Kind kind = is_upload ? Kind::kUpload : is_download ? Kind::kDownload : Kind::kCopy;
    KernelViews views;
    const Tensor from = views.of(source), to = views.of(target);
    if (other != nullptr) Mark::of(*other).hold_up(stream);
    const uint64_t ticket =
        stream.submit(kind, "copy_", std::min(source.nbytes(), target.nbytes()), [from, to] {
            at::AutoDispatchBelowADInplaceOrView guard;
            c10::ParallelGuard alone(true);
            to.copy_(from);
        });
    if (other != nullptr) Mark::of(stream).hold_up(*other);
    const bool is_locked_copy =
        kind == Kind::kCopy || is_locked((is_upload ? source : target).storage().data());
    if (kind != Kind::kCopy && !(non_blocking && is_locked_copy)) {
        stream.wait(ticket);
        raise_failure();
    }
    return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
    if (target.sizes() != source.sizes()) target.resize_(source.sizes());
    return copy_from(source, target, false);
}

const Tensor& resize(const Tensor& self, IntArrayRef sizes, std::optional<at::MemoryFormat>) {
    auto* impl = self.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(sizes);
    const size_t needed = (size_t(impl->storage_offset()) + size_t(impl->numel())) * self.itemsize();
    if (self.storage().nbytes() < needed) Hooks().resizePrivateUse1Bytes(self.storage(), needed);
    return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, IntArrayRef sizes,
                    IntArrayRef strides) {
    auto* impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(source));
    if (strides.data() == nullptr) {
        impl->set_storage_offset(offset);
        impl->set_sizes_contiguous(sizes);
    } else {
        impl->set_sizes_and_strides(sizes, strides, offset);
    }
    return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
    const auto numel = int64_t(source.nbytes() / self.itemsize());
    return set_storage(self, std::move(source), 0, {numel}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
    return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
    c10::Storage storage(c10::Storage::use_byte_size_t(), 0, &allocator, true);
    return set_storage(self, std::move(storage), 0, {0}, {});
}

void record_stream(Tensor& self, c10::Stream on) {
    Guard().recordDataPtrOnStream(self.storage().data_ptr(), on);
}

/// The CPU's native_dropout draws from the CPU's own generator.
std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
    Tensor mask = at::empty_like(input, input.options().dtype(at::kBool));
    if (!train.value_or(true)) return {input.clone(), mask.fill_(true)};
    mask.bernoulli_(1.0 - p);
    return {at::mul(input, mask).mul_(p == 1.0 ? 0.0 : 1.0 / (1.0 - p)), mask};
}

/// Call another operation for tensors of the device.
Tensor result_of(const char* name, Stack arguments) {
    Call(c10::Dispatcher::singleton().findSchemaOrThrow(name, ""), arguments).run();
    return arguments[0].toTensor();
}

// What torch asks of a device instead of its own convolutions, by the same arguments.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef output_padding, int64_t groups) {
    return result_of("aten::convolution", {input, weight, bias, stride.vec(), padding.vec(), dilation.vec(),
                                           transposed, output_padding.vec(), groups});
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input,
                                                        const Tensor& weight, IntArrayRef stride,
                                                        IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding,
                                                        int64_t groups, std::array<bool, 3> mask) {
    const std::vector<int64_t> bias_sizes = {grad.size(1)};
    Stack stack = {grad,
                   input,
                   weight,
                   bias_sizes,
                   stride.vec(),
                   padding.vec(),
                   dilation.vec(),
                   transposed,
                   output_padding.vec(),
                   groups,
                   c10::List<bool>({mask[0], mask[1], mask[2]})};
    Call(c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", ""), stack).run();
    return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
}

bool may_become(const Tensor&, const Tensor&) { return true; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&call>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("as_strided", at::native::as_strided_tensorimpl);
    library.impl("view", at::native::view);
    library.impl("_reshape_alias", at::native::_reshape_alias);
    library.impl("unfold", at::native::unfold);
    library.impl("view_as_real", at::native::view_as_real);
    library.impl("view_as_complex", at::native::view_as_complex);
    library.impl("resize_", resize);
    library.impl("set_.source_Storage_storage_offset", set_storage);
    library.impl("set_.source_Storage", set_whole_storage);
    library.impl("set_.source_Tensor", set_tensor);
    library.impl("set_", set_nothing);
    library.impl("_copy_from", copy_from);
    library.impl("_copy_from_and_resize", copy_from_and_resize);
    library.impl("record_stream", record_stream);
    library.impl("native_dropout", native_dropout);
    library.impl("convolution_overrideable", convolution);
    library.impl("convolution_backward_overrideable", convolution_backward);
    library.impl("_has_compatible_shallow_copy_type", may_become);
    // Torch would compose these of others for a device it does not know; the CPU's kernels give the CPU's
    // bits.
    for (const char* name :
         {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward", "addr", "_stack"})
        library.impl(name, torch::CppFunction::makeFromBoxedFunction<&call>());
}

// Parameters on the meta device may become the device's too, by `.data`.
TORCH_LIBRARY_IMPL(aten, Meta, library) { library.impl("_has_compatible_shallow_copy_type", may_become); }

const bool has_hooks = [] {
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
}();

}  // namespace
}  // namespace async_device

// ---------------------------------------------------------------- for __init__.py

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT void async_device_set_option(int which, int64_t value) {
    using namespace async_device;
    std::atomic<int64_t>* all[] = {
        &options.seed,
        &options.max_kernel_delay_us,
        &options.max_copy_delay_us,
        &options.has_lazy_kernels,
        &options.has_lazy_copies,
        &options.kernel_cost_us,
        &options.upload_nbytes_per_second,
        &options.download_nbytes_per_second,
        &options.capacity_nbytes,
        &options.is_visible_to_host,
        &options.fills_new_blocks,
        &options.keeps_records,
    };
    const bool is_visibility =
        all[which] == &options.is_visible_to_host && value != options.is_visible_to_host;
    all[which]->store(value);
    for (int index = 0; index < kNumDevices; ++index) device(index).wake();
    for (int index = 0; is_visibility && index < kNumDevices; ++index)
        device(index).set_visibility(value != 0);
}

EXPORT void async_device_counts(int64_t* number, int64_t* nbytes) {
    for (int kind = 0; kind < 5; ++kind) {
        number[kind] = async_device::counts.number[kind].load();
        nbytes[kind] = async_device::counts.nbytes[kind].load();
    }
}

EXPORT int async_device_take_record(async_device::Record* into) { return async_device::take_record(into); }

EXPORT void async_device_set_random_state(int device, uint64_t seed, uint64_t num_drawn) {
    async_device::random_state[device][0].store(seed);
    async_device::random_state[device][1].store(num_drawn);
}

EXPORT void async_device_random_state(int device, uint64_t* into) {
    for (int i = 0; i < 2; ++i) into[i] = async_device::random_state[device][i].load();
}

EXPORT void async_device_lock(void* address, size_t nbytes) {
    async_device::lock_host_memory(address, nbytes);
}

EXPORT int async_device_unlock(void* address) { return async_device::unlock_host_memory(address); }
}
