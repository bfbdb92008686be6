// The updates in place, on one span. Included by kernels.cpp inside the namespace of its
// instruction set.
//
// W is the dtype in which the weights are kept: that of theta, T, or with master weights its
// arithmetic dtype, in which m, v and v_max are kept too.

// W of a pointer W*; std::remove_pointer would be shared between instruction sets' objects.
template <class P>
struct Unqualified;
template <class W>
struct Unqualified<W*> {
  typedef W type;
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

// Writes the new theta, and with master weights the new weights too.
template <bool kStream, class T, class W>
IMBSAM_INLINE void store_weights(T* theta, W* master, typename Lanes<T>::V stepped) {
  if (master) store(master, stepped);
  if (kStream)
    stream(theta, stepped);
  else
    store(theta, stepped);
}

template <class T, class W, bool kHead, bool kMomentum, bool kStream>
void sgd_update_lines(T* theta, const W* from, const T* g_h, const T* g_p, W* m, W* master,
                      int64_t n, const Sgd<typename Lanes<T>::S>& sgd) {
  typedef typename Lanes<T>::V V;
  constexpr int lanes = Lanes<T>::kLanes;
  // Reads one vector of every input, writes the new m, returns the new theta.
  const auto updated = [&](const W* start_, const T* h, const T* p, W* velocity) -> V {
    const V start = load(start_);
    const V d = sgd_direction(start, kHead ? load(h) + load(p) : load(p), sgd);
    if (!kMomentum) return sgd_step(start, d, d, sgd);
    const V moved = sgd_momentum(load(velocity), d, sgd);
    store(velocity, moved);
    return sgd_step(start, moved, d, sgd);
  };
  for_each_line(
      theta, n, kStream,
      [&](int64_t i) {
        const V stepped = updated(from + i, g_h + i, g_p + i, m + i);
        store_weights<kStream>(theta + i, master ? master + i : nullptr, stepped);
      },
      [&](int64_t i, int64_t count) {
        W s[lanes] = {}, velocity[lanes] = {}, kept[lanes];
        T h[lanes] = {}, p[lanes] = {}, stepped[lanes];
        copy(s, from + i, count);
        if (kHead) copy(h, g_h + i, count);
        copy(p, g_p + i, count);
        if (kMomentum) copy(velocity, m + i, count);
        store_weights<false>(stepped, kept, updated(s, h, p, velocity));
        copy(theta + i, stepped, count);
        if (master) copy(master + i, kept, count);
        if (kMomentum) copy(m + i, velocity, count);
      });
  if (kStream) stream_fence();
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

template <class T>
void sgd_update_(void* theta, const void* saved, const void* g_h, const void* g_p, void* m,
                 void* master, int64_t n, const SgdSettings& s, bool stream) {
  typedef typename Lanes<T>::S S;
  const S unscale = S(1) / (S)s.grad_scale;
  const Sgd<S> sgd = {(S)s.lr, (S)s.momentum, (S)(1 - s.dampening), (S)s.weight_decay,
                      s.maximize ? -unscale : unscale, m && s.nesterov};
  // What was just read is in the cache and streaming does not pay.
  const bool theta_is_read = !saved && !master;
  with_weights<T>(theta, saved, master, [&](auto* from, auto* kept) {
    typedef typename Unqualified<decltype(kept)>::type W;
    if (s.skip) {
      if (!theta_is_read) restore_lines<false>((T*)theta, from, n);
      return;
    }
    with_bool(g_h != nullptr, [&](auto has_head) {
      with_bool(m != nullptr, [&](auto has_momentum) {
        with_bool(stream && !theta_is_read, [&](auto streams) {
          sgd_update_lines<T, W, decltype(has_head)::value, decltype(has_momentum)::value,
                           decltype(streams)::value>(
              (T*)theta, from, (const T*)g_h, (const T*)g_p, (W*)m, kept, n, sgd);
        });
      });
    });
  });
}

// ---------------------------------------------------------------- Adam

template <class T, class W>
struct AdamLists {
  T* theta;
  const W* from;
  const T *g_h, *g_p;  // null g_h, v_max, master: absent
  W *m, *v, *v_max, *master;
};

template <class T, class W, bool kStream>
void adam_update_lines(const AdamLists<T, W>& x, int64_t n,
                       const Adam<typename Lanes<T>::S>& adam,
                       const BiasCorrections<typename Lanes<T>::S>& corrections) {
  typedef typename Lanes<T>::V V;
  constexpr int lanes = Lanes<T>::kLanes;
  // Reads one vector of every input, writes the new m, v and v_max, returns the new theta.
  const auto updated = [&](const AdamLists<T, W>& at) -> V {
    const V start = load(at.from);
    const V d = adam_direction(start, at.g_h ? load(at.g_h) + load(at.g_p) : load(at.g_p), adam);
    const V m = adam_first_moment(load(at.m), d, adam);
    V v = adam_second_moment(load(at.v), d, adam);
    store(at.m, m);
    store(at.v, v);
    if (at.v_max) {
      v = larger(load(at.v_max), v);
      store(at.v_max, v);
    }
    return adam_step(start, m, square_root(v), adam, corrections);
  };
  for_each_line(
      x.theta, n, kStream,
      [&](int64_t i) {
        const AdamLists<T, W> at = {x.theta + i, x.from + i, x.g_h ? x.g_h + i : nullptr,
                                    x.g_p + i,   x.m + i,    x.v + i,
                                    x.v_max ? x.v_max + i : nullptr,
                                    x.master ? x.master + i : nullptr};
        store_weights<kStream>(at.theta, at.master, updated(at));
      },
      [&](int64_t i, int64_t count) {
        T h[lanes] = {}, p[lanes] = {}, stepped[lanes];
        W s[lanes] = {}, m[lanes] = {}, v[lanes] = {}, v_max[lanes] = {}, kept[lanes];
        copy(s, x.from + i, count);
        if (x.g_h) copy(h, x.g_h + i, count);
        copy(p, x.g_p + i, count);
        copy(m, x.m + i, count);
        copy(v, x.v + i, count);
        if (x.v_max) copy(v_max, x.v_max + i, count);
        const AdamLists<T, W> at = {stepped, s, x.g_h ? h : nullptr,         p,
                                    m,       v, x.v_max ? v_max : nullptr, kept};
        store_weights<false>(stepped, kept, updated(at));
        copy(x.theta + i, stepped, count);
        if (x.master) copy(x.master + i, kept, count);
        copy(x.m + i, m, count);
        copy(x.v + i, v, count);
        if (x.v_max) copy(x.v_max + i, v_max, count);
      });
  if (kStream) stream_fence();
}

template <class T>
void adam_update_(void* theta, const void* saved, const void* g_h, const void* g_p, void* m,
                  void* v, void* v_max, void* master, int64_t n, int64_t step,
                  const AdamSettings& s, bool stream) {
  typedef typename Lanes<T>::S S;
  const S unscale = S(1) / (S)s.grad_scale;
  const S decay = (S)s.weight_decay;
  const Adam<S> adam = {(S)s.lr,    (S)s.beta1,
                        (S)(1 - s.beta1), (S)s.beta2,
                        (S)(1 - s.beta2), (S)s.eps,
                        s.decoupled ? S(0) : decay, s.decoupled ? decay : S(0),
                        s.maximize ? -unscale : unscale};
  const BiasCorrections<S> corrections = bias_corrections<S>(s.beta1, s.beta2, step);
  const bool theta_is_read = !saved && !master;
  with_weights<T>(theta, saved, master, [&](auto* from, auto* kept) {
    typedef typename Unqualified<decltype(kept)>::type W;
    if (s.skip) {
      if (!theta_is_read) restore_lines<false>((T*)theta, from, n);
      return;
    }
    const AdamLists<T, W> lists = {(T*)theta, from,   (const T*)g_h, (const T*)g_p,
                                   (W*)m,     (W*)v, (W*)v_max,     kept};
    with_bool(stream && !theta_is_read, [&](auto streams) {
      adam_update_lines<T, W, decltype(streams)::value>(lists, n, adam, corrections);
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
