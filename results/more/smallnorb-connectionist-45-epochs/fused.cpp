// Connectionist routing (capsnet.py: ConnectionistRouting with P = 4, hidden_size = 16), forward
// and backward, for a CPU with AVX2. See fused.py.
//
// One output capsule at one position at a time, all its iterations in turn, so that the state of
// its LSTM stays in the core's cache; the backward pass computes the forward pass again. A row is a
// vector over the inputs i, of which there are I. Names are those of capsnet.py; dx is the gradient
// of x.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

const int I = INPUTS;  // from the compiler's command line; a multiple of 8
const int H = 16, P = 4, D = P * P, G = 4 * H, TMAX = 3;

#define UNROLL _Pragma("GCC unroll 16")
typedef float v8 __attribute__((vector_size(32)));
typedef float u8 __attribute__((vector_size(32), aligned(4)));
typedef int i8 __attribute__((vector_size(32)));
static inline v8 ld(const float* p) { return *(const u8*)p; }
static inline v8 loaded(const float* p) {  // into a register, once
    v8 x = ld(p);
    asm("" : "+x"(x));
    return x;
}
static inline void st(float* p, v8 x) { *(u8*)p = x; }
static inline v8 all(float x) { return v8{x, x, x, x, x, x, x, x}; }
static inline float sum(v8 x) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
static inline v8 max(v8 x, v8 y) { return (v8)_mm256_max_ps((__m256)x, (__m256)y); }

static inline v8 vexp(v8 x) {  // relative error about 2e-7 + 1.4e-8 |x|
    x = -max(-max(x, all(-87.0f)), all(-87.0f));
    v8 t = x * all(1.44269504f) + all(12582912.0f);  // rounds to an integer, in the lowest bits
    v8 f = x * all(1.44269504f) - (t - all(12582912.0f));  // x log2(e) = n + f
    v8 p = all(1.537071015e-04f);
    p = p * f + all(1.339985307e-03f);
    p = p * f + all(9.618373264e-03f);
    p = p * f + all(5.550329023e-02f);
    p = p * f + all(2.402264846e-01f);
    p = p * f + all(6.931472056e-01f);
    p = p * f + all(1.0f);
    return (v8)((i8)p + ((i8)t << 23));
}
static inline v8 vsigmoid(v8 x) { return all(1.0f) / (all(1.0f) + vexp(-x)); }
static inline v8 vtanh(v8 x) { return all(2.0f) / (all(1.0f) + vexp(x * all(-2.0f))) - all(1.0f); }

// C[m][i] = sum_k A[m][k] B[k][i] [+ init[m][i] [+ more[m]]]
template <int R, int V, int K>
static inline void block(const float* A, const float* B, float* C, const float* init,
                         const float* more) {
    v8 c[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) {
            c[r][v] = init ? ld(init + r * I + 8 * v) : all(0);
            if (more) c[r][v] += all(more[r]);
        }
    UNROLL for (int k = 0; k < K; k++) {
        v8 b[V];
        UNROLL for (int v = 0; v < V; v++) b[v] = loaded(B + k * I + 8 * v);
        UNROLL for (int r = 0; r < R; r++) {
            v8 a = all(A[r * K + k]);
            UNROLL for (int v = 0; v < V; v++) c[r][v] += a * b[v];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) st(C + r * I + 8 * v, c[r][v]);
}
template <int R, int V, int K>
static __attribute__((noinline)) void rows_of(int M, const float* A, const float* B, float* C,
                                              const float* init, const float* more) {
    for (; M >= R; M -= R) {
        int i = 0;
        for (; i + 8 * V <= I; i += 8 * V)
            block<R, V, K>(A, B + i, C + i, init ? init + i : init, more);
        for (; i < I; i += 8) block<R, 1, K>(A, B + i, C + i, init ? init + i : init, more);
        A += R * K, C += R * I;
        if (init) init += R * I;
        if (more) more += R;
    }
}
template <int K>
static void gemm_of(int M, const float* A, const float* B, float* C, const float* init,
                    const float* more) {
    int m = M & ~3;
    rows_of<4, 3, K>(m, A, B, C, init, more);
    if (m < M)
        rows_of<1, 6, K>(M - m, A + m * K, B, C + m * I, init ? init + m * I : init,
                         more ? more + m : more);
}
static void gemm(int M, int K, const float* A, const float* B, float* C,
                 const float* init = nullptr, const float* more = nullptr) {
    switch (K) {
#define CASE(k) \
    case k: return gemm_of<k>(M, A, B, C, init, more);
        CASE(1) CASE(17) CASE(18) CASE(32) CASE(33) CASE(64) CASE(65)
        default: __builtin_trap();
    }
}

// A[m][k] += sum_i C[m][i] B[k][i], eight partial sums for each entry of A
template <int R, int S>
static inline void dots(const float* C, const float* B, float* A, int lda) {
    v8 a[R][S];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int s = 0; s < S; s++) a[r][s] = ld(A + 8 * (r * lda + s));
    UNROLL for (int i = 0; i < I; i += 8) {
        v8 b[S];
        UNROLL for (int s = 0; s < S; s++) b[s] = loaded(B + s * I + i);
        UNROLL for (int r = 0; r < R; r++) {
            v8 c = loaded(C + r * I + i);
            UNROLL for (int s = 0; s < S; s++) a[r][s] += c * b[s];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int s = 0; s < S; s++) st(A + 8 * (r * lda + s), a[r][s]);
}
template <int R>
static __attribute__((noinline)) void dots_row(int K, const float* C, const float* B, float* A) {
    int k = 0;
    for (; k + 3 <= K; k += 3) dots<R, 3>(C, B + k * I, A + 8 * k, K);
    for (; k < K; k++) dots<R, 1>(C, B + k * I, A + 8 * k, K);
}
static void outer(int M, int K, const float* C, const float* B, float* A) {
    int m = 0;
    for (; m + 4 <= M; m += 4) dots_row<4>(K, C + m * I, B, A + 8 * m * K);
    for (; m < M; m++) dots_row<1>(K, C + m * I, B, A + 8 * m * K);
}
static float dot(const float* x, const float* y) {
    v8 a = all(0);
    for (int i = 0; i < I; i += 8) a += ld(x + i) * ld(y + i);
    return sum(a);
}
static void axpy(float a, const float* x, float* y) {
    v8 va = all(a);
    for (int i = 0; i < I; i += 8) st(y + i, ld(y + i) + va * ld(x + i));
}

struct Weights {          // row-major; of the LSTM cell and of phi
    const float* fixed;   // (G, D + 1): of the vote, of the activation
    const float* mu;      // (G, D)
    const float* rec;     // (G, H + 2): of h, of c, the bias
    int layers;           // of phi, from widths[0] = H to widths[layers] = 1
    const int* widths;
    const float* const* phi;  // (widths[l + 1], rows(l)): weight, [0 for c,] bias
    int rows(int l) const { return l ? widths[l] + 1 : H + 2; }
};
static std::vector<float> transposed(const float* A, int M, int K) {
    std::vector<float> out(M * K);
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++) out[k * M + m] = A[m * K + k];
    return out;
}

struct Rows {  // aligned memory for rows of I
    std::vector<float> pool;
    float* p;
    Rows(int rows) : pool((size_t)rows * I + 16, 0.0f) {
        p = (float*)(((size_t)pool.data() + 63) & ~(size_t)63);
    }
    float* take(int n) { float* q = p; p += (size_t)n * I; return q; }
};

struct Column {  // the state of one output capsule
    int T;
    const Weights& w;
    Rows rows;
    float *x, *fixed;              // (D + 1, I): votes, activation; (G, I)
    float *gates[TMAX], *s[TMAX], *ts[TMAX];
    float *hc[TMAX + 1];           // (H + 2, I): h and c of the iteration before, ones
    float *z[TMAX][4];             // hidden layers of phi, with a row of ones
    float mu[TMAX + 1][D];
    std::vector<float> muT;

    static int count(int T, const Weights& w) {
        int n = D + 1 + G + T * (G + 2 * H) + (T + 1) * (H + 2);
        for (int l = 1; l < w.layers; l++) n += T * (w.widths[l] + 1);
        return n;
    }
    Column(int T, const Weights& w) : T(T), w(w), rows(count(T, w)) {
        muT = transposed(w.mu, G, D);
        x = rows.take(D + 1), fixed = rows.take(G);
        for (int t = 0; t <= T; t++) {
            hc[t] = rows.take(H + 2);
            std::fill_n(hc[t] + (H + 1) * I, I, 1.0f);
        }
        std::fill_n(c(0), I, 1.0f / I);
        for (int t = 0; t < T; t++) {
            gates[t] = rows.take(G), s[t] = rows.take(H), ts[t] = rows.take(H);
            for (int l = 1; l < w.layers; l++) {
                z[t][l] = rows.take(w.widths[l] + 1);
                std::fill_n(z[t][l] + w.widths[l] * I, I, 1.0f);
            }
        }
    }
    float* c(int t) { return hc[t] + H * I; }

    void vote(const float* W, const float* M, const float* a) {  // (D, I), (D, I), (I)
        for (int i = 0; i < I; i += 8) {
            UNROLL for (int r = 0; r < P; r++) {
                v8 m[P];
                UNROLL for (int q = 0; q < P; q++) m[q] = ld(M + (q * P + r) * I + i);
                UNROLL for (int p = 0; p < P; p++) {
                    v8 v = all(0);
                    UNROLL for (int q = 0; q < P; q++) v += ld(W + (p * P + q) * I + i) * m[q];
                    st(x + (p * P + r) * I + i, v);
                }
            }
            st(x + D * I + i, ld(a + i));
        }
    }

    void forward() {
        gemm(G, D + 1, w.fixed, x, fixed);
        for (int d = 0; d < D; d++) mu[0][d] = dot(c(0), x + d * I);
        for (int t = 0; t < T; t++) {
            float* g = gates[t];
            float from_mu[G];
            for (int r = 0; r < G; r += 8) {
                v8 m = all(0);
                UNROLL for (int d = 0; d < D; d++)
                    m += ld(muT.data() + d * G + r) * all(mu[t][d]);
                st(from_mu + r, m);
            }
            if (t) {
                gemm(G, H + 2, w.rec, hc[t], g, fixed, from_mu);
            } else {  // h is zero, and c the same for all
                for (int r = 0; r < G; r++) {
                    const float* rec = w.rec + r * (H + 2);
                    v8 m = all(from_mu[r] + rec[H] / I + rec[H + 1]);
                    for (int i = 0; i < I; i += 8) st(g + r * I + i, ld(fixed + r * I + i) + m);
                }
            }
            float *h = hc[t + 1];
            const float* s0 = t ? s[t - 1] : hc[0];  // or zeros
            const int HI = H * I;
            // One loop for the gates and one for the state: in a single one the core waits.
            for (int j = 0; j < 2 * HI; j += 8) st(g + j, vsigmoid(ld(g + j)));
            for (int j = 2 * HI; j < 3 * HI; j += 8) st(g + j, vtanh(ld(g + j)));
            for (int j = 3 * HI; j < 4 * HI; j += 8) st(g + j, vsigmoid(ld(g + j)));
            for (int j = 0; j < HI; j += 8) {
                v8 state = ld(g + HI + j) * ld(s0 + j) + ld(g + j) * ld(g + 2 * HI + j);
                v8 th = vtanh(state);
                st(s[t] + j, state), st(ts[t] + j, th), st(h + j, ld(g + 3 * HI + j) * th);
            }
            const float* in = h;
            std::fill_n(c(t + 1), I, 0.0f);  // a row of phi's input: any finite number
            for (int l = 0; l < w.layers; l++) {
                bool last = l + 1 == w.layers;
                float* out = last ? c(t + 1) : z[t][l + 1];
                gemm(w.widths[l + 1], w.rows(l), w.phi[l], in, out);
                if (!last)
                    for (int j = 0; j < w.widths[l + 1] * I; j += 8)
                        st(out + j, max(ld(out + j), all(0)));
                in = out;
            }
            float* p = c(t + 1);
            v8 tops = ld(p);
            for (int i = 8; i < I; i += 8) tops = max(tops, ld(p + i));
            float top = tops[0];
            for (int k = 1; k < 8; k++) top = tops[k] > top ? tops[k] : top;
            v8 total = all(0);
            for (int i = 0; i < I; i += 8) {
                v8 e = vexp(ld(p + i) - all(top));
                st(p + i, e), total += e;
            }
            v8 scale = all(1 / sum(total));
            for (int i = 0; i < I; i += 8) st(p + i, ld(p + i) * scale);
            for (int d = 0; d < D; d++) mu[t + 1][d] = dot(p, x + d * I);
        }
    }
};

struct Grads {  // eight partial sums for each weight
    std::vector<float> fixed, rec, phi[4];
    float mu[G * D] = {};
    Grads(const Weights& w) : fixed(8 * G * (D + 1)), rec(8 * G * (H + 2)) {
        for (int l = 0; l < w.layers; l++) phi[l].resize(8 * w.widths[l + 1] * w.rows(l));
    }
};

struct Backward {  // through one Column, whose gates it overwrites
    const Weights& w;
    std::vector<float> fixedT, recT, phiT[4];
    Rows rows;
    float *dx, *dhc, *ds, *db, *dz[2];

    static int widest(const Weights& w) {
        int n = H;
        for (int l = 0; l < w.layers; l++) n = std::max(n, w.widths[l]);
        return n;
    }
    Backward(const Weights& w) : w(w), rows(D + 1 + H + 1 + H + 1 + 2 * widest(w)) {
        fixedT = transposed(w.fixed, G, D + 1), recT = transposed(w.rec, G, H + 2);
        for (int l = 0; l < w.layers; l++)
            phiT[l] = transposed(w.phi[l], w.widths[l + 1], w.rows(l));
        dx = rows.take(D + 1), dhc = rows.take(H + 1), ds = rows.take(H), db = rows.take(1);
        dz[0] = rows.take(widest(w)), dz[1] = rows.take(widest(w));
    }

    // gmu (D), gt (H): gradients of mu and of sum_i c_i s_i. Afterwards dx holds those of x.
    void run(Column& k, const float* gmu, const float* gt, Grads& grads) {
        const int T = k.T, HI = H * I;
        float dmu[D], *dc = dhc + HI, *dfixed = k.fixed;
        memcpy(dmu, gmu, sizeof dmu);
        memset(dx, 0, sizeof(float) * (D + 1) * I), memset(dhc, 0, sizeof(float) * (H + 1) * I);
        for (int h = 0; h < H; h++)
            for (int i = 0; i < I; i += 8) {
                st(dc + i, ld(dc + i) + all(gt[h]) * ld(k.s[T - 1] + h * I + i));
                st(ds + h * I + i, all(gt[h]) * ld(k.c(T) + i));
            }
        for (int t = T - 1; t >= 0; t--) {
            float *c = k.c(t + 1), *g = k.gates[t];
            for (int d = 0; d < D; d++)
                for (int i = 0; i < I; i += 8) {
                    st(dc + i, ld(dc + i) + all(dmu[d]) * ld(k.x + d * I + i));
                    st(dx + d * I + i, ld(dx + d * I + i) + all(dmu[d]) * ld(c + i));
                }
            float mean = dot(c, dc) / dot(c, c + I);  // ones: c, rounded, need not sum to 1
            for (int i = 0; i < I; i += 8) st(db + i, ld(c + i) * (ld(dc + i) - all(mean)));
            const float* dout = db;
            for (int l = w.layers - 1; l >= 0; l--) {
                outer(w.widths[l + 1], w.rows(l), dout, l ? k.z[t][l] : k.hc[t + 1],
                      grads.phi[l].data());
                if (l == 0) {
                    gemm(H, w.widths[1], phiT[0].data(), dout, dhc, dhc);  // onto dh
                } else {
                    float *din = dz[l % 2], *in = k.z[t][l];
                    gemm(w.widths[l], w.widths[l + 1], phiT[l].data(), dout, din);
                    for (int j = 0; j < w.widths[l] * I; j += 8)
                        st(din + j, (v8)((i8)(ld(in + j) > all(0)) & (i8)ld(din + j)));
                    dout = din;
                }
            }
            const float* s0 = t ? k.s[t - 1] : k.hc[0];  // or zeros
            for (int j = 0; j < HI; j += 8) {
                v8 one = all(1), gi = ld(g + j), gf = ld(g + HI + j), gg = ld(g + 2 * HI + j);
                v8 go = ld(g + 3 * HI + j), th = ld(k.ts[t] + j), dh = ld(dhc + j);
                v8 d = ld(ds + j) + dh * go * (one - th * th);
                st(ds + j, d * gf);
                v8 out[4] = {d * gg * gi * (one - gi), d * ld(s0 + j) * gf * (one - gf),
                             d * gi * (one - gg * gg), dh * th * go * (one - go)};
                UNROLL for (int q = 0; q < 4; q++) {
                    float* sum = dfixed + q * HI + j;
                    st(g + q * HI + j, out[q]);
                    st(sum, t < T - 1 ? ld(sum) + out[q] : out[q]);
                }
            }
            v8 lo = all(0), hi = all(0);
            for (int r = 0; r < G; r++) {
                v8 total = all(0);
                for (int i = 0; i < I; i += 8) total += ld(g + r * I + i);
                v8 m = all(sum(total));
                float* dw = grads.mu + r * D;
                lo += m * ld(w.mu + r * D), hi += m * ld(w.mu + r * D + 8);
                st(dw, ld(dw) + m * ld(k.mu[t])), st(dw + 8, ld(dw + 8) + m * ld(k.mu[t] + 8));
                if (!t) {  // one of eight partial sums
                    grads.rec[8 * (r * (H + 2) + H)] += m[0] / I;
                    grads.rec[8 * (r * (H + 2) + H + 1)] += m[0];
                }
            }
            st(dmu, lo), st(dmu + 8, hi);
            if (t) {
                outer(G, H + 2, g, k.hc[t], grads.rec.data());
                gemm(H + 1, G, recT.data(), g, dhc);
            }
        }
        for (int d = 0; d < D; d++) axpy(dmu[d], k.c(0), dx + d * I);
        outer(G, D + 1, dfixed, k.x, grads.fixed.data());
        gemm(D + 1, G, fixedT.data(), dfixed, dx, dx);
    }

    // the votes' gradients, added to those of W, M and a
    void vote(const float* W, const float* M, float* dW, float* dM, float* da) {
        for (int i = 0; i < I; i += 8) {
            v8 v[D];
            UNROLL for (int d = 0; d < D; d++) v[d] = ld(dx + d * I + i);
            UNROLL for (int p = 0; p < P; p++)
                UNROLL for (int q = 0; q < P; q++) {
                    float* to = dW + (p * P + q) * I + i;
                    v8 x = ld(to);
                    UNROLL for (int r = 0; r < P; r++)
                        x += v[p * P + r] * ld(M + (q * P + r) * I + i);
                    st(to, x);
                }
            UNROLL for (int q = 0; q < P; q++)
                UNROLL for (int r = 0; r < P; r++) {
                    float* to = dM + (q * P + r) * I + i;
                    v8 x = ld(to);
                    UNROLL for (int p = 0; p < P; p++)
                        x += v[p * P + r] * ld(W + (p * P + q) * I + i);
                    st(to, x);
                }
            st(da + i, ld(da + i) + ld(dx + D * I + i));
        }
    }
};

static void on_threads(int threads, int N, const std::function<void(int, int)>& run) {
    std::vector<std::thread> pool;
    for (int k = 1; k < threads; k++)
        pool.emplace_back(run, N * k / threads, N * (k + 1) / threads);
    run(0, N / threads);
    for (auto& thread : pool) thread.join();
}

// W (O, D, I), M (N, D, I), a (N, I) -> mu (N, O, D), total (N, O, H)
extern "C" void forward(int O, int N, int T, int threads, const float* W, const float* M,
                        const float* a, const float* wfixed, const float* wmu, const float* wrec,
                        int layers, const int* widths, const float* const* phi, float* mu,
                        float* total) {
    Weights w{wfixed, wmu, wrec, layers, widths, phi};
    on_threads(threads, N, [&](int first, int end) {
        Column k(T, w);
        for (int o = 0; o < O; o++)
            for (int n = first; n < end; n++) {
                k.vote(W + (size_t)o * D * I, M + (size_t)n * D * I, a + n * I);
                k.forward();
                memcpy(mu + (n * O + o) * D, k.mu[T], sizeof(float) * D);
                for (int h = 0; h < H; h++)
                    total[(n * O + o) * H + h] = dot(k.c(T), k.s[T - 1] + h * I);
            }
    });
}

// gmu, gtotal: gradients of the results. Those of all inputs are added to dW, dM, ...
extern "C" void backward(int O, int N, int T, int threads, const float* W, const float* M,
                         const float* a, const float* wfixed, const float* wmu, const float* wrec,
                         int layers, const int* widths, const float* const* phi,
                         const float* gmu, const float* gtotal, float* dW, float* dM, float* da,
                         float* dfixed, float* dwmu, float* drec, float** dphi) {
    Weights w{wfixed, wmu, wrec, layers, widths, phi};
    std::mutex mutex;
    on_threads(threads, N, [&](int first, int end) {
        Column k(T, w);
        Backward b(w);
        Grads grads(w);
        std::vector<float> own(D * I);
        for (int o = 0; o < O; o++) {
            const float* Wo = W + (size_t)o * D * I;
            std::fill(own.begin(), own.end(), 0.0f);
            for (int n = first; n < end; n++) {
                const float* Mn = M + (size_t)n * D * I;
                k.vote(Wo, Mn, a + n * I);
                k.forward();
                b.run(k, gmu + (n * O + o) * D, gtotal + (n * O + o) * H, grads);
                b.vote(Wo, Mn, own.data(), dM + (size_t)n * D * I, da + n * I);
            }
            std::lock_guard<std::mutex> lock(mutex);
            auto add = [](float* to, std::vector<float>& from) {
                for (size_t j = 0; j < from.size() / 8; j++) to[j] += sum(ld(&from[8 * j]));
                std::fill(from.begin(), from.end(), 0.0f);  // one long sum would round more
            };
            for (int j = 0; j < D * I; j++) dW[(size_t)o * D * I + j] += own[j];
            for (int j = 0; j < G * D; j++) dwmu[j] += grads.mu[j], grads.mu[j] = 0;
            add(dfixed, grads.fixed), add(drec, grads.rec);
            for (int l = 0; l < layers; l++) add(dphi[l], grads.phi[l]);
        }
    });
}
