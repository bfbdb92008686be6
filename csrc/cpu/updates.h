// The updates in place, on one span. Included by kernels.cpp inside the namespace of its
// instruction set.
//
// W is the dtype in which the weights are kept: that of theta, T, or with master weights its
// arithmetic dtype, in which the state of the base is kept too.

// W of a pointer W*; std::remove_pointer would be shared between instruction sets' objects.
template <class P>
struct Unqualified;
template <class W>
struct Unqualified<W*> {
  typedef W type;
};

// 0, 1 .. kCount - 1 as template arguments; std::integer_sequence would be shared likewise.
template <int... kIndices>
struct Indices {};
template <int kCount, int... kIndices>
struct UpTo : UpTo<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct UpTo<0, kIndices...> {
  typedef Indices<kIndices...> type;
};

// Calls f with a compile-time true or false.
struct True { static constexpr bool value = true; };
struct False { static constexpr bool value = false; };
template <class F>
IMBSAM_INLINE void with_bool(bool b, F f) {
  if (b)
    f(True());
  else
    f(False());
}

template <class T>
void perturb_(void* theta_, void* g_t_, const void* master_, void* held_, int64_t n,
              double scale_, bool adaptive) {
  typedef typename Lanes<T>::S S;
  constexpr int lanes = Lanes<T>::kLanes;
  T *theta = (T*)theta_, *g_t = (T*)g_t_, *held = (T*)held_;
  const S* master = (const S*)master_;
  const S scale = (S)scale_;
  // With master weights theta is not read and g_t not written.
  const auto line = [&](T* t, T* g, const S* from, T* h) {
    const auto start = from ? load(from) : load(t);
    const auto moved = perturbed(start, load(g), scale, adaptive);
    if (h) store(h, load(h) - load(g));
    if (!from) copy(g, t, lanes);
    store(t, moved);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    line(theta + i, g_t + i, master ? master + i : nullptr, held ? held + i : nullptr);
  if (i < n) {
    T t[lanes] = {}, g[lanes] = {}, h[lanes] = {};
    S from[lanes] = {};
    copy(t, theta + i, n - i);
    copy(g, g_t + i, n - i);
    if (master) copy(from, master + i, n - i);
    if (held) copy(h, held + i, n - i);
    line(t, g, master ? from : nullptr, held ? h : nullptr);
    copy(theta + i, t, n - i);
    copy(g_t + i, g, n - i);
    if (held) copy(held + i, h, n - i);
  }
}

// Calls line(i) for whole vectors, and edge(i, n) for the elements before `aligned` is aligned
// for streaming and for the last ones.
template <class T, class Line, class Edge>
IMBSAM_INLINE void for_each_line(const T* aligned, int64_t n, bool align, Line line, Edge edge) {
  constexpr int lanes = Lanes<T>::kLanes;
  const int64_t misaligned = ((uintptr_t)aligned / sizeof(T)) % lanes;
  int64_t i = align && misaligned ? lanes - misaligned : 0;
  if (i >= n) i = n;
  if (i) edge(0, i);
  for (; i + lanes <= n; i += lanes) line(i);
  if (i < n) edge(i, n - i);
}

// Writes the new theta, and with master weights, whose dtype is not that of theta, these too.
template <bool kStream, class T, class W>
IMBSAM_INLINE void store_weights(T* theta, W* master, typename Lanes<T>::V stepped) {
  if constexpr (sizeof(W) != sizeof(T)) store(master, stepped);
  if (kStream)
    stream(theta, stepped);
  else
    store(theta, stepped);
}

// One vector, rounded; the very bits where there is nothing to round.
template <class T, class W>
IMBSAM_INLINE void round_line(T* to, const W* from) {
  store(to, load(from));
}
template <class T>
IMBSAM_INLINE void round_line(T* to, const T* from) {
  copy(to, from, Lanes<T>::kLanes);
}

// theta <- from, rounded where that is master weights
template <bool kStream, class T, class W>
void restore_lines(T* theta, const W* from, int64_t n) {
  constexpr int lanes = Lanes<T>::kLanes;
  for_each_line(
      theta, n, kStream,
      [&](int64_t i) {
        if (kStream)
          stream(theta + i, load(from + i));
        else
          round_line(theta + i, from + i);
      },
      [&](int64_t i, int64_t count) {
        W s[lanes] = {};
        T t[lanes];
        copy(s, from + i, count);
        round_line(t, (const W*)s);
        copy(theta + i, t, count);
      });
  if (kStream) stream_fence();
}

// Calls f(start, master): where the weights are read, and where they are kept besides theta or
// null. The type of both is W.
template <class T, class F>
IMBSAM_INLINE void with_weights(void* theta, const void* saved, void* master, F f) {
  typedef typename Lanes<T>::S S;
  if (master)
    f((const S*)master, (S*)master);
  else
    f((const T*)(saved ? saved : theta), (T*)nullptr);
}

// ---------------------------------------------------------------- the fused bases

template <class T, class W, int kState>
struct UpdateLines {
  T* theta;
  const W* from;
  const T *g_h, *g_p;  // null g_h, state: absent
  W* state[kState];
  W* master;  // null where W is T
};

// Reads one vector of every input, writes the new state, returns the new theta. has: a bit for each
// list of the state that is there; head: whether g_h is.
template <Base kBase, class T, class W>
IMBSAM_INLINE typename Lanes<T>::V updated(
    const W* from, const T* g_h, const T* g_p, W* const* at, unsigned has, bool head,
    const Formula<kBase, typename Lanes<T>::S>& formula,
    const OfTensor<kBase, typename Lanes<T>::S>& of_tensor) {
  typedef typename Lanes<T>::V V;
  constexpr int count = entry(kBase).state_count;
  V state[count];
  bool there[count];
  const V start = load(from);
  for (int k = 0; k < count; ++k) {
    there[k] = has >> k & 1;
    state[k] = there[k] ? load(at[k]) : V{};
  }
  const V g = head ? load(g_h) + load(g_p) : load(g_p);
  const V theta = stepped(formula, of_tensor, start, g, state, there);
  for (int k = 0; k < count; ++k)
    if (there[k]) store(at[k], state[k]);
  return theta;
}

// The elements i .. i + m, fewer than a vector: one function for all of kHas, kHead and kStream, for
// it runs at most twice a span.
template <Base kBase, class T, class W>
__attribute__((noinline)) void update_edge(
    const UpdateLines<T, W, entry(kBase).state_count>& x, unsigned has, int64_t i, int64_t m,
    const Formula<kBase, typename Lanes<T>::S>& formula,
    const OfTensor<kBase, typename Lanes<T>::S>& of_tensor) {
  constexpr int lanes = Lanes<T>::kLanes, count = entry(kBase).state_count;
  W start[lanes] = {}, state[count][lanes] = {}, kept[lanes];
  T h[lanes] = {}, p[lanes] = {}, theta[lanes];
  W* at[count];
  copy(start, x.from + i, m);
  if (x.g_h) copy(h, x.g_h + i, m);
  copy(p, x.g_p + i, m);
  for (int k = 0; k < count; ++k) {
    at[k] = state[k];
    if (has >> k & 1) copy(at[k], x.state[k] + i, m);
  }
  const auto stepped =
      updated<kBase, T, W>(start, h, p, at, has, x.g_h != nullptr, formula, of_tensor);
  store_weights<false>(theta, kept, stepped);
  copy(x.theta + i, theta, m);
  if constexpr (sizeof(W) != sizeof(T)) copy(x.master + i, kept, m);
  for (int k = 0; k < count; ++k)
    if (has >> k & 1) copy(x.state[k] + i, at[k], m);
}

// kHas: a bit for each list of the state that is there.
template <Base kBase, unsigned kHas, bool kHead, bool kStream, class T, class W>
void update_lines(const UpdateLines<T, W, entry(kBase).state_count>& x, int64_t n,
                  const Formula<kBase, typename Lanes<T>::S>& formula,
                  const OfTensor<kBase, typename Lanes<T>::S>& of_tensor) {
  constexpr int count = entry(kBase).state_count;
  for_each_line(
      x.theta, n, kStream,
      [&](int64_t i) {
        W* at[count];
        for (int k = 0; k < count; ++k) at[k] = kHas >> k & 1 ? x.state[k] + i : nullptr;
        const auto theta = updated<kBase>(x.from + i, x.g_h + i, x.g_p + i, at, kHas, kHead,
                                          formula, of_tensor);
        store_weights<kStream>(x.theta + i, x.master + i, theta);
      },
      [&](int64_t i, int64_t m) { update_edge<kBase>(x, kHas, i, m, formula, of_tensor); });
  if (kStream) stream_fence();
}

// Calls f with a compile-time Mask of the lists of the state that are there, from list k on.
template <unsigned kBits>
struct Mask { static constexpr unsigned value = kBits; };
template <Base kBase, int k = 0, unsigned kHas = 0, class F>
IMBSAM_INLINE void with_state(void* const* state, F f) {
  if constexpr (k == entry(kBase).state_count)
    f(Mask<kHas>());
  else if (entry(kBase).state[k].required || state[k])
    with_state<kBase, k + 1, kHas | 1u << k>(state, f);
  else if constexpr (!entry(kBase).state[k].required)
    with_state<kBase, k + 1, kHas>(state, f);
}

template <class T, Base kBase>
void update_(const UpdateSpan& span, const UpdateSettings& s, bool stream) {
  typedef typename Lanes<T>::S S;
  constexpr int count = entry(kBase).state_count;
  const S unscale = S(1) / (S)s.grad_scale;
  Formula<kBase, S> formula;
  formula.lr = (S)s.lr;
  formula.grad_factor = s.maximize ? -unscale : unscale;
  fill_own(formula, s.own);
  OfTensor<kBase, S> once;
  of_tensor(once, formula, span.step);
  // What was just read is in the cache and streaming does not pay.
  const bool theta_is_read = !span.saved && !span.master;
  with_weights<T>(span.theta, span.saved, span.master, [&](auto* from, auto* kept) {
    typedef typename Unqualified<decltype(kept)>::type W;
    if (s.skip) {
      if (!theta_is_read) restore_lines<false>((T*)span.theta, from, span.n);
      return;
    }
    UpdateLines<T, W, count> lines = {(T*)span.theta, from, (const T*)span.g_h,
                                      (const T*)span.g_p, {}, kept};
    for (int k = 0; k < count; ++k) lines.state[k] = (W*)span.state[k];
    with_state<kBase>(span.state, [&](auto has) {
      with_bool(span.g_h != nullptr, [&](auto has_head) {
        with_bool(stream && !theta_is_read, [&](auto streams) {
          update_lines<kBase, decltype(has)::value, decltype(has_head)::value,
                       decltype(streams)::value>(lines, span.n, formula, once);
        });
      });
    });
  });
}

// ---------------------------------------------------------------- other bases

template <class T>
void merge_(void* theta, const void* saved, const void* g_h, void* g_p, int64_t n, bool stream) {
  constexpr int lanes = Lanes<T>::kLanes;
  if (saved)
    with_bool(stream, [&](auto streams) {
      restore_lines<decltype(streams)::value>((T*)theta, (const T*)saved, n);
    });
  if (!g_h) return;
  const T* head = (const T*)g_h;
  T* sum = (T*)g_p;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(sum + i, load(head + i) + load(sum + i));
  if (i < n) {
    T h[lanes] = {}, p[lanes] = {};
    copy(h, head + i, n - i);
    copy(p, sum + i, n - i);
    store(p, load(h) + load(p));
    copy(sum + i, p, n - i);
  }
}
